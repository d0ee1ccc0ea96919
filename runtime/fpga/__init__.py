"""What a model would do on an FPGA, from an analytic model: parts, cycles, resources, and the search among them.

Nothing here runs anything or needs a board or a vendor's tool. The engine that is modelled is the one in hls/README.md.
"""
