"""Where kinds run: alone, or on a Ray cluster. The only room that imports ray."""

import os

from poise.engine.auth import read_token
from poise.env import RAY_DEFAULTS

for _name, _value in RAY_DEFAULTS.items():  # here, because Ray reads some of them when it is imported
    os.environ.setdefault(_name, _value)

if read_token() is not None:  # Ray's heads ask for a token as soon as there is one
    os.environ.setdefault("RAY_AUTH_MODE", "token")
