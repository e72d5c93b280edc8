"""A request and an answer that have every field, as protobuf's JSON and as Adobe's."""

import re
from pathlib import Path

FAMILY = "👩‍👩‍👧‍👦 日本語 Übergröße \"quoted\" \\ \n"

REQUEST = {
    "datasetId": "every-field",
    "externalId": "Ω-1",
    "inputFormat": {
        "format": "csv",
        "isMultiLineJson": False,
        "delimiter": "\t",
        "quote": '"',
        "escape": "\\",
        "nullMarker": "∅",
        "charset": "UTF-8",
        "header": True,
    },
    "replay": {
        "reason": "replace",
        "predecessors": ["$one", "$two"],
        "predecessorsByExternalId": ["$drei"],
    },
    "tags": {FAMILY: {"values": [FAMILY, "", "한국어"]}},
    "enableErrorDiagnostics": False,
    "partialIngestionPercent": 12.5,
}

# What Adobe must get for it.
REST_REQUEST = {**REQUEST, "tags": {FAMILY: [FAMILY, "", "한국어"]}}

METRICS = {"rows": 3, "share": 0.5, "steps": [{"name": "日本", "ok": True}, None]}
REST_ERROR = {"code": "106", "description": "Größe", "rows": ["1", "13-26"], "recordCount": 14}

# An answer of Adobe's, and what a client must get for it.
REST_ANSWER = {
    "id": "every-field-1",
    "imsOrg": "demo@AdobeOrg",
    "created": 1668019531256,
    "updated": 1668019532001,
    "started": 1668019533120,
    "completed": 1668019534999,
    "status": "failed",
    "recordCount": 9007199254740993,
    "failedRecordCount": 14,
    "size": 1342576,
    "version": "1.0.1",
    "externalId": "Ω-1",
    "inputFormat": REQUEST["inputFormat"],
    "relatedObjects": [
        {
            "type": "dataSet",
            "id": "every-field",
            "tag": "input",
            "status": "active",
            "errors": [REST_ERROR],
            "metrics": METRICS,
        }
    ],
    "tags": REST_REQUEST["tags"],
    "createdUser": "c@AdobeID",
    "updatedUser": "u@AdobeID",
    "createdClient": "demo",
    "availableDates": {"startDate": 1668019531, "endDate": 1668019532},
    "errors": [REST_ERROR],
    "metrics": METRICS,
    "replay": REQUEST["replay"],
    "unheard": {"of": [1, "日本語", None, {"deep": False}]},
}
ERROR = {**REST_ERROR, "recordCount": "14"}
ANSWER = {
    "batch": {
        **{name: value for name, value in REST_ANSWER.items() if name != "unheard"},
        "created": "2022-11-09T18:45:31.256Z",
        "updated": "2022-11-09T18:45:32.001Z",
        "started": "2022-11-09T18:45:33.120Z",
        "completed": "2022-11-09T18:45:34.999Z",
        "status": "BATCH_STATUS_FAILED",
        "recordCount": "9007199254740993",
        "failedRecordCount": "14",
        "size": "1342576",
        "relatedObjects": [
            {
                **REST_ANSWER["relatedObjects"][0],
                "status": "BATCH_STATUS_ACTIVE",
                "errors": [ERROR],
            }
        ],
        "tags": REQUEST["tags"],
        "availableDates": {
            "startDate": "2022-11-09T18:45:31Z",
            "endDate": "2022-11-09T18:45:32Z",
        },
        "errors": [ERROR],
        "extra": {"unheard": REST_ANSWER["unheard"]},
    },
    "origin": "BATCH_ORIGIN_CREATED",
}


def missing_fields(proto: Path) -> list[str]:
    """The fields of the proto that the samples do not have."""
    samples = {
        "CreateBatchRequest": REQUEST,
        "InputFormat": REQUEST["inputFormat"],
        "Replay": REQUEST["replay"],
        "CreateBatchResponse": ANSWER,
        "Batch": ANSWER["batch"],
        "RelatedObject": ANSWER["batch"]["relatedObjects"][0],
        "BatchError": ERROR,
        "AvailableDates": ANSWER["batch"]["availableDates"],
        "TagValues": REQUEST["tags"][FAMILY],
    }
    missing = []
    for message, body in re.findall(r"^message (\w+) {\n(.*?)^}", proto.read_text(), re.M | re.S):
        for field in re.findall(r"^ .* (\w+) = \d+;$", body, re.M):
            name = re.sub(r"_(\w)", lambda match: match[1].upper(), field)
            if name not in samples.get(message, {}):
                missing.append(f"{message}.{field}")
    return missing
