"""Drop-ins for other projects' models, one module a project; none imports its project before it is used."""
