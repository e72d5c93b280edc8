//! The bodies of errors, in every shape that Adobe documents.

use serde_json::{Map, Value};

use crate::{outcome::ApiError, quote::Quote};

/// How much of one text is quoted, in bytes.
const LONGEST: usize = 1024;

/// Reads the body of an answer with a status of 400 or above. Shapes
/// ("Experience Platform troubleshooting guide", and Adobe IMS for OAuth):
///
/// - `{"error_code":"403010","message":"…"}`, the API gateway
/// - `{"type":"…","status":400,"title":"…","detail":"…","report":…}`
/// - `{"error":"invalid_client","error_description":"…"}`, OAuth
///
/// A body of another shape is quoted as it is.
pub fn read(body: &[u8], quote: &Quote<'_>) -> ApiError {
    match serde_json::from_slice(body) {
        Ok(Value::Object(object)) => read_object(&object, quote),
        _ => None,
    }
    .unwrap_or_else(|| ApiError {
        detail: Some(quote.bytes(body, LONGEST)).filter(|text| !text.is_empty()),
        ..Default::default()
    })
}

fn read_object(object: &Map<String, Value>, quote: &Quote<'_>) -> Option<ApiError> {
    let text = |name: &str| {
        let text = match object.get(name)? {
            Value::Null => return None,
            Value::String(text) => quote.text(text, LONGEST),
            other => quote.text(&other.to_string(), LONGEST),
        };
        (!text.is_empty()).then_some(text)
    };
    let has = |name: &str| object.contains_key(name);

    if has("error_code") {
        Some(ApiError {
            documented: true,
            code: text("error_code"),
            detail: text("message"),
            report: text("report"),
            ..Default::default()
        })
    } else if has("title") && (has("status") || has("detail") || has("type")) {
        Some(ApiError {
            documented: true,
            code: text("errorCode").or_else(|| text("code")),
            title: text("title"),
            detail: text("detail"),
            report: text("report"),
        })
    } else if object.get("error").is_some_and(Value::is_string) && has("error_description") {
        Some(ApiError {
            documented: true,
            code: text("error"),
            detail: text("error_description"),
            ..Default::default()
        })
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn some(text: &str) -> Option<String> {
        Some(text.to_owned())
    }

    #[test]
    fn each_documented_shape_is_read() {
        let table = [
            (
                r#"{"error_code":"403010","message":"Oauth token is missing."}"#,
                ApiError {
                    documented: true,
                    code: some("403010"),
                    detail: some("Oauth token is missing."),
                    ..Default::default()
                },
            ),
            (
                r#"{"error_code":403010,"message":null}"#,
                ApiError {
                    documented: true,
                    code: some("403010"),
                    ..Default::default()
                },
            ),
            (
                r#"{"type":"/placeholder/type/uri","status":400,"title":"BadRequestError","detail":"A valid content-type must be specified"}"#,
                ApiError {
                    documented: true,
                    title: some("BadRequestError"),
                    detail: some("A valid content-type must be specified"),
                    ..Default::default()
                },
            ),
            (
                r#"{"status":400,"title":"T","detail":{"why":"x"},"report":{"id":7}}"#,
                ApiError {
                    documented: true,
                    title: some("T"),
                    detail: some(r#"{"why":"x"}"#),
                    report: some(r#"{"id":7}"#),
                    ..Default::default()
                },
            ),
            (
                r#"{"error":"invalid_client","error_description":"no such client"}"#,
                ApiError {
                    documented: true,
                    code: some("invalid_client"),
                    detail: some("no such client"),
                    ..Default::default()
                },
            ),
        ];
        for (body, expected) in table {
            assert_eq!(read(body.as_bytes(), &Quote::default()), expected, "{body}");
        }
    }

    #[test]
    fn any_other_body_is_quoted() {
        for body in [
            "<html>no</html>",
            "upstream connect error",
            r#"{"message":"no"}"#,
            r#"{"error":{"code":5}}"#,
            "[1]",
            "null",
        ] {
            let error = read(body.as_bytes(), &Quote::default());
            assert!(!error.documented, "{body}");
            assert_eq!(error.detail.as_deref(), Some(body));
        }
        assert_eq!(read(b" \n", &Quote::default()), ApiError::default());
        let long = "x".repeat(1 << 20);
        let detail = read(long.as_bytes(), &Quote::default()).detail;
        assert_eq!(detail.map(|text| text.len()), Some(LONGEST));
    }
}
