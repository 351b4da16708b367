"""Ways to look at a boundary, one small class each. `look.py` is what they share and where to begin with one's own."""
