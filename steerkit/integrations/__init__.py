"""Doors to other tools of the field, one file each."""
