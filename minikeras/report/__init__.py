"""What a person sees.

progress.py        a fit on a terminal or in a pipe: the bar and the table
notebook.py        ... and in a notebook, as one output that redraws itself
layer_summary.py   model.summary: a table of the layers
plotting.py        figures of the history
"""
