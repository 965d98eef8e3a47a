"""What pyproject.toml cannot say: the recipes lie beside the package and are installed as `slime_recipes`."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["slime", "slime.*"]), "slime_recipes"],
    package_dir={"slime_recipes": "recipes"},
    package_data={"slime": ["cpu/sglang/**/*", "cpu/sglang/**/.*"], "slime_recipes": ["**/*.yaml"]},
    include_package_data=False,
)
