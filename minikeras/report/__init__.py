"""What a person sees.

progress.py        a fit on a terminal or in a pipe: the bar and the rows
table.py           ... the columns of its table, which fit the terminal
notebook.py        ... and in a notebook, as one output that redraws itself
layer_summary.py   model.summary: a table of the layers
plotting.py        figures of the history
"""
