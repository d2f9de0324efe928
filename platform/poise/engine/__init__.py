"""Starts runs: in this process, under torchrun, or on a Ray cluster. The only package that imports ray."""

import os

from poise.engine.ray.auth import read_token
from poise.env import RAY_DEFAULTS

for _name, _value in RAY_DEFAULTS.items():  # on import of this package, because Ray reads some of them on its import
    os.environ.setdefault(_name, _value)

if read_token() is not None:  # a user with a token has clusters that require it
    os.environ.setdefault("RAY_AUTH_MODE", "token")
