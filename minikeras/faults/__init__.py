"""What can go wrong during a fit, and how each case is handled.

guard.py      NaN and infinities: a part of the stepper and a hook, on top of the next two
loss.py       a NaN or infinite loss: found before the weights are updated
weights.py    NaN or infinite weights after finite losses: found before they reach a file
"""
