"""Placing a spec on processes: meshes, process groups, and all that is cut over them.

Parameters are DTensors, activations plain local tensors. The one visible order of placement is in
`placement.py`.
"""
