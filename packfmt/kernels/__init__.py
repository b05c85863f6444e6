"""Numba loops. A kernel knows arrays: no layout, no codec, no file."""
