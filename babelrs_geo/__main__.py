"""`python -m babelrs_geo`: the command line."""

from babelrs_geo.cli import main

if __name__ == "__main__":
    main()
