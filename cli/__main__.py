"""python -m alexprep.cli"""

from alexprep.cli.main import main

if __name__ == "__main__":
    main()
