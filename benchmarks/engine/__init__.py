"""Speed of the engine beside other systems on the same weights, cores, prompts and number of tokens.

``python -m benchmarks.engine`` runs it. ``checkpoints`` makes the models, ``environments`` the virtual environments of
peers, ``workloads`` the prompts, ``systems`` holds one server per system and the line protocol that drives it,
``measure`` the rounds, ``figures`` what they come to, ``report`` the page, the JSON file and the plot.
"""
