"""Where kinds run: alone, or on a Ray cluster. The only room that imports ray."""

import os

from poise.env import RAY_DEFAULTS

for _name, _value in RAY_DEFAULTS.items():  # here, because Ray reads some of them when it is imported
    os.environ.setdefault(_name, _value)

if os.path.isfile(os.path.expanduser("~/.ray/auth_token")):  # Ray writes it by itself, and then its heads ask for it
    os.environ.setdefault("RAY_AUTH_MODE", "token")
