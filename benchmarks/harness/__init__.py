"""What every study shares: command line, data, models, optimizers by name, training, rows, statistics, reports.

Read in this order: ``cli`` starts a study; ``tasks`` and ``data`` give it examples; ``optimizers`` makes what is
compared; ``training`` runs it (``loop`` is one step); ``tuning`` chooses settings on validation data; ``rows`` keeps
every run; ``statistics`` and ``report`` turn rows into tables and figures. The studies are in ``benchmarks/studies``.
"""
