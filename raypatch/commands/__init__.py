"""The commands of the command line: options to one call each; heavy imports come inside."""
