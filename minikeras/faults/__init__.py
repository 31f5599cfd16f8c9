"""What can go wrong during a fit, and how each case is handled.

guard.py      NaN and infinities: a part of the stepper and a hook, over the next two
loss.py       a loss that is NaN or infinite: found before it moves a weight
weights.py    weights that are, though each loss was finite: found before they reach a file
"""
