"""Print what pyproject.toml asks for, with the extras named: `python requirements.py server ray`. Its own layer in an
image, so that a change of Cuvee's code installs nothing again."""

import sys
import tomllib

project = tomllib.load(open("pyproject.toml", "rb"))["project"]
wanted = [project["dependencies"], *(project["optional-dependencies"][extra] for extra in sys.argv[1:])]
print(*(line for lines in wanted for line in lines), sep="\n")
