"""The commands of the tool, one module each: `add_arguments` names its flags, `run` runs it."""
