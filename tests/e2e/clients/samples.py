"""Requests and responses that have every field, as protobuf's JSON and as Adobe's."""

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

# A response of Adobe's, and what a client must get for it.
REST_BATCH = {
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
    "replay": {**REQUEST["replay"], "predecessorListingType": "ALL"},
    "failedBatchLocation": "https://platform.adobe.io/data/foundation/export/batches/1/failed",
    "unheard": {"of": [1, "日本語", None, {"deep": False}]},
}
ERROR = {**REST_ERROR, "recordCount": "14"}
RESPONSE = {
    "batch": {
        **{name: value for name, value in REST_BATCH.items() if name != "unheard"},
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
                **REST_BATCH["relatedObjects"][0],
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
        "extra": {"unheard": REST_BATCH["unheard"]},
    },
    "origin": "BATCH_ORIGIN_CREATED",
}

# What a list is asked for, and the query that the API must get for it.
LIST_REQUEST = {
    "datasetId": "every-field",
    "statuses": ["BATCH_STATUS_FAILED", "BATCH_STATUS_FAILURE"],
    "externalId": "Ω-1",
    "createdAfter": "2022-11-09T18:45:31.250Z",
    "createdBefore": "2022-11-09T18:45:31.300Z",
    "pageSize": 1,
}
LIST_QUERY = {
    "dataSet": "every-field",
    "status": "failed,failure",
    "externalId": "Ω-1",
    "createdAfter": "1668019531250",
    "createdBefore": "1668019531300",
    "limit": "1",
}

LONG = "Größe überschritten 🚫 100 %\n" * 500

# What the API says to the creates of a dataset: status, body and further headers.
RESPONSES = {
    "every-field": (201, REST_BATCH),
    "empty-tag": (201, {"id": "1", "tags": {"one": ["1"], "none": []}}),
    "long-error": (400, {"title": LONG, "detail": LONG, "report": LONG}),
    "limited": (429, {"error_code": "429001", "message": "Too many requests"}, {"retry-after": "30"}),
    "busy": (503, {"error_code": "503000", "message": "busy"}, {"retry-after": "30"}),
}


def missing_fields(proto: Path) -> list[str]:
    """The fields of the proto that the samples do not have."""
    samples = {
        "CreateBatchRequest": REQUEST,
        "InputFormat": REQUEST["inputFormat"],
        "Replay": RESPONSE["batch"]["replay"],
        "CreateBatchResponse": RESPONSE,
        "GetBatchRequest": {"batchId"},
        "GetBatchResponse": {"batch"},
        "ListBatchesRequest": {*LIST_REQUEST, "pageToken"},
        "ListBatchesResponse": {"batches", "nextPageToken"},
        "Batch": RESPONSE["batch"],
        "RelatedObject": RESPONSE["batch"]["relatedObjects"][0],
        "BatchError": ERROR,
        "AvailableDates": RESPONSE["batch"]["availableDates"],
        "TagValues": REQUEST["tags"][FAMILY],
    }
    missing = []
    for message, body in re.findall(r"^message (\w+) {\n(.*?)^}", proto.read_text(), re.M | re.S):
        for field in re.findall(r"^ .* (\w+) = \d+;$", body, re.M):
            name = re.sub(r"_(\w)", lambda match: match[1].upper(), field)
            if name not in samples.get(message, {}):
                missing.append(f"{message}.{field}")
    return missing
