"""What can be known of a spec before anything is started: can its files, runs and functions be used?

Of large local files only the beginnings are read, and no network is used: what is on S3 is checked by the run that
reads it. A check takes a fraction of a second, and seconds where files of rows are large. torch is imported only to
compare the names and shapes of a state dict with those of a network, and transformers only where the files of a
language model alone do not settle a question.
"""

from poise.kinds.check.field_error import FieldError
from poise.kinds.check.spec import find_errors

__all__ = ["FieldError", "find_errors"]
