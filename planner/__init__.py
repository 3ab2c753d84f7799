"""Where the parts of a model go on many devices: placement of experts on ranks.

Nothing here knows graphs: loads, sizes and topologies go in, placements come out.
"""
