"""Gates as JUnit XML, which CI systems show as tests."""

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from llmopt.errors import InputError

_ELEMENTS = {"fail": "failure", "inconclusive": "error"}


def write_junit(result: dict[str, Any], path: str | Path) -> None:
    """Write one test case for each gate of an `eval` result: a failure where it failed, an error where it is
    inconclusive. Raises InputError where the file cannot be written."""
    gates = result["gates"]
    counts = {f"{element}s": sum(g["verdict"] == v for g in gates) for v, element in _ELEMENTS.items()}
    attributes = {"name": f"llmopt eval {result['model']}", "tests": len(gates), **counts}
    suite = ElementTree.Element("testsuite", {name: str(value) for name, value in attributes.items()})
    for gate in gates:
        case = ElementTree.SubElement(suite, "testcase", {"classname": gate["metric"], "name": gate["name"]})
        if gate["verdict"] in _ELEMENTS:
            message = {"type": gate["verdict"], "message": explain(gate)}
            ElementTree.SubElement(case, _ELEMENTS[gate["verdict"]], message)
    try:
        ElementTree.ElementTree(suite).write(path, encoding="utf-8", xml_declaration=True)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None


def explain(gate: dict[str, Any]) -> str:
    """A gate's verdict in words."""
    interval = gate["interval"]
    spread = "no interval" if interval is None else f"interval {interval[0]:.4g} to {interval[1]:.4g}"
    return f"{gate['metric']} is {gate['value']:.4g} ({spread}), {gate['side']} {gate['bound']:.4g}"
