"""What a graph is found with: the frozen map of one run, what starts and ends edges, two directions, the checks."""
