"""Where kinds run: alone, or on a Ray cluster. The only room that imports ray."""
