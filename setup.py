"""The description on a package page: the README without what only a checkout can show."""

import re
from pathlib import Path

from setuptools import setup

readme = (Path(__file__).parent / "README.md").read_text("utf-8")
# Pictures and links that are relative lead nowhere from there: no picture, and words for links.
without_pictures = re.sub(r"!\[[^]]*\]\((?!https?:)[^)]*\)\n*", "", readme)
description = re.sub(r"\[([^]]*)\]\((?!https?:|#)[^)]*\)", r"\1", without_pictures)

setup(long_description=description, long_description_content_type="text/markdown")
