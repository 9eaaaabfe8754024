"""Decoding: one token after another as fast as the machine allows, with the tokens that `generate()` would give."""
