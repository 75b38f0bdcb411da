"""The demo: one workload of agents, run three ways, measured by what reached the server."""
