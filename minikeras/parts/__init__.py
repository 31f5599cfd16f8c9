"""Parts of the stepper: what lies between a loss and moved weights. Each file is one and knows no other.

clip.py              gradients clipped by norm or by value
accumulate.py        several batches make one step
mixed_precision.py   autocast, and the loss scale of float16
bare_calls.py        refuses loss.backward() and optimizer.step() that would pass the others by
"""
