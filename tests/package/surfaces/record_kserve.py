"""Record the fields that KServe's published models have, for the test of inferenceservice.yaml.

    pip download --no-deps kserve && python record_kserve.py kserve-0.21.0-*.whl > kserve-0.21.json

KServe generates these classes from its custom resource's schema. The package needs a web server, a
Kubernetes client and an older protobuf; its files are read, not imported.
"""

import ast
import json
import re
import sys
import zipfile

MODELS = """
    inference_service inference_service_spec predictor_spec model_spec model_format
"""


def main(wheel: str) -> None:
    """Print each class's fields by their name in YAML, with type, and which must be there."""
    classes = {}
    with zipfile.ZipFile(wheel) as archive:
        for name in MODELS.split():
            text = archive.read(f"kserve/models/v1beta1_{name}.py").decode()
            types = ast.literal_eval(re.search(r"openapi_types = (\{.*?\})", text, re.S)[1])
            names = ast.literal_eval(re.search(r"attribute_map = (\{.*?\})", text, re.S)[1])
            required = re.findall(r"Invalid value for `(\w+)`, must not be `None`", text)
            classes[re.search(r"class (\w+)", text)[1]] = {
                "fields": {names[field]: kind for field, kind in types.items()},
                "required": sorted({names[field] for field in required}),
            }
    version = re.search(r"kserve-([\d.]+)-", wheel)[1]
    json.dump({"kserve": version, "classes": classes}, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main(sys.argv[1])
