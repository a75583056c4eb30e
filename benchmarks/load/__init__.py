"""What compression buys end to end: ``python -m benchmarks.load``.

``checkpoint`` makes the model, ``work`` draws what is asked and under which compression, ``local`` answers it with an engine in this process and
``served`` through worker processes, ``measure`` holds the rounds, ``report`` writes the page, the JSON file and the plot.
"""
