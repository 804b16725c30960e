"""Where other software runs packed models: an adapter for each, all of the plain configuration in `losa.runtime.header`."""
