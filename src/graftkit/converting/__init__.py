"""One adapter in every engine's form: the update ΔW is what stays equal."""
