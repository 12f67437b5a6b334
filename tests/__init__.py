"""A package, so that no `tests` that another package has installed (torch-fidelity does) takes its place."""
