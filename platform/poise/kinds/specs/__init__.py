"""The whole spec of each kind, put together from the sections of the rooms. Light: `poise check` reads them."""
