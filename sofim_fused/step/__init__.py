"""One step: gather -> sums -> reduce -> solve -> update."""
