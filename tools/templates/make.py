#!/usr/bin/env python3
"""Write the templates that ComfyUI's template browser shows, from graphs.py.

    python3 tools/templates/make.py [--pictures [NAME ...]]

Writes workflows/NAME.json, which the frontend opens, workflows/api/NAME.json, which run.py and /prompt take, the apps
(NAME.app.json) and subgraphs/NAME.json, and removes those that graphs.py no longer has. What inputs a node has comes from a
ComfyUI that is started for it. --pictures paints the thumbnails again, too, all or those named, and with the demo's
docs/pictures/demo.png: minutes.
"""

import argparse
import json
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
parent = types.ModuleType("svdq_pack")          # the pack's folder name is not ours to assume, so name its package here
parent.__path__ = [str(ROOT)]
sys.modules.setdefault(parent.__name__, parent)
if __name__ == "__main__":                      # with any Python; pictures want ComfyUI's
    from svdq_pack.workflows.headless import environment
    environment.enter(__file__)

from svdq_pack.tools.templates import forms  # noqa: E402
from svdq_pack.tools.templates.graphs import BLUEPRINTS, TEMPLATES  # noqa: E402

APP = ".app"


def files(definitions):
    """{path from the repository's root: text} of everything but pictures."""
    made, by_name = {}, {template.name: template for template in TEMPLATES}
    for template in TEMPLATES:
        made[f"workflows/{template.name}.json"] = forms.canvas_form(template, definitions)
        made[f"workflows/api/{template.name}.json"] = forms.api_form(template, definitions)
        if template.app:
            made[f"workflows/{template.name}{APP}.json"] = forms.canvas_form(template, definitions, app=True)
    for template, name, *rest in BLUEPRINTS:
        made[f"subgraphs/{name}.json"] = forms.blueprint(by_name[template], definitions, name, *rest)
    return {path: json.dumps(form, indent=1, ensure_ascii=False) + "\n" for path, form in made.items()}


def present():
    """Paths of such files as they are, from the repository's root."""
    return {path.relative_to(ROOT).as_posix() for folder in ("workflows", "workflows/api", "subgraphs")
            for path in (ROOT / folder).glob("*.json")}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", nargs="*", metavar="NAME", help="paint the thumbnails again")
    options = parser.parse_args()
    from svdq_pack.workflows.headless.client import Client
    from svdq_pack.workflows.headless.process import ComfyProcess
    with ComfyProcess(environment.find() or environment.make()) as server, Client(server.url) as client:
        made = files(client.object_info())
        for path in present() - made.keys():
            (ROOT / path).unlink()
        for path, text in made.items():
            (ROOT / path).parent.mkdir(exist_ok=True)
            (ROOT / path).write_text(text, encoding="utf-8")
        print(f"{len(made)} files of {len(TEMPLATES)} templates")
        if options.pictures is not None:
            from svdq_pack.tools.templates import pictures
            pictures.paint(client, ROOT, options.pictures or [template.name for template in TEMPLATES])


if __name__ == "__main__":
    main()
