"""Everything that turns rooms into a cluster: settings, checks, the Serve application, its life, the command line.

The top layer: may import all others, and nothing imports it.
"""
