"""Parts of the stepper: what happens between a loss and the update of the weights.

Each file is one part, and knows no other.

clip.py              clip gradients by norm or by value
accumulate.py        make one step of several batches
mixed_precision.py   autocast, and the loss scale of float16
bare_calls.py        refuse loss.backward() and optimizer.step() that would bypass the others
"""
