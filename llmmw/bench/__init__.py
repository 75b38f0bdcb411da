"""`llmmw bench`: the same N questions in several shapes against one server, measured at the client.

`shapes.py` asks, `run.py` takes the shapes in turn, `figures.py` computes, `report.py` shows.
"""
