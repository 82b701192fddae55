"""The site: `make docs` builds it. Pages are in `pages/`, what is made at build time in the modules beside this one."""
