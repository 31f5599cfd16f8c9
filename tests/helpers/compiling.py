"""Options of torch.compile that take little time."""

# traces and differentiates as ever, and leaves out the C++ compiler
FAST = {"backend": "aot_eager"}
