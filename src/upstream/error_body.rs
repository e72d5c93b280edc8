//! The bodies of errors, in every shape that Adobe documents.

use crate::{
    failure::ErrorBody,
    mapping::json::{Document, Json, Members, text_of},
    redact::Redactor,
};

/// How much of one text is quoted, in bytes.
const LONGEST: usize = 1024;

/// Reads the body of an error. Shapes ("Experience Platform troubleshooting
/// guide", and Adobe IMS for OAuth):
///
/// - `{"error_code":"403010","message":"…"}`, the API gateway
/// - `{"type":"…","status":400,"title":"…","detail":"…","report":…}`
/// - `{"error":"invalid_client","error_description":"…"}`, OAuth
///
/// It is read as leniently as a success: with a byte order mark, in Latin-1,
/// with half a surrogate pair or a number that no double holds. A body of
/// another shape is quoted as it is.
pub fn read(body: &[u8], redactor: &Redactor<'_>) -> ErrorBody {
    known_shape(body, redactor).unwrap_or_else(|| ErrorBody {
        detail: Some(redactor.bytes(body, LONGEST)).filter(|text| !text.is_empty()),
        ..Default::default()
    })
}

fn known_shape(body: &[u8], redactor: &Redactor<'_>) -> Option<ErrorBody> {
    let text = text_of(body);
    read_members(&Document::parse(&text)?.root().object()?, redactor)
}

/// Whether a body is an error, in these or other shapes: it has a member that
/// errors have and no documented batch has.
pub(super) fn is_error(body: &[u8]) -> bool {
    const MARKS: [&str; 6] = [
        "error",
        "error_code",
        "errorCode",
        "fault",
        "message",
        "title",
    ];
    let text = text_of(body);
    let document = Document::parse(&text);
    let members = document
        .as_ref()
        .and_then(|document| document.root().object());
    let mut names = members.iter().flatten().map(|(name, _)| name.as_ref());
    names.any(|name| MARKS.contains(&name))
}

fn read_members(members: &Members<'_>, redactor: &Redactor<'_>) -> Option<ErrorBody> {
    // Of equal names the last holds, as for most readers of JSON.
    let member = |name: &str| members.iter().rfind(|(known, _)| known == name);
    let has = |name: &str| member(name).is_some();
    let string = |name: &str| member(name)?.1.string();
    let text = |name: &str| {
        let (_, json) = member(name)?;
        let text = match json.is_null() {
            true => return None,
            false => redactor.text(&json.string().unwrap_or(json.text().to_owned()), LONGEST),
        };
        (!text.is_empty()).then_some(text)
    };

    if has("error_code") {
        let code = text("error_code");
        Some(ErrorBody {
            is_adobes: code.as_deref().is_some_and(is_adobes_code),
            code,
            detail: text("message"),
            report: text("report"),
            ..Default::default()
        })
    } else if has("title") && (has("status") || has("detail") || has("type")) {
        Some(ErrorBody {
            is_adobes: string("type").is_some_and(|uri| is_adobes_type(&uri)),
            code: text("errorCode").or_else(|| text("code")),
            title: text("title"),
            detail: text("detail"),
            report: text("report"),
        })
    } else if member("error").is_some_and(|(_, json)| is_string(*json)) && has("error_description")
    {
        Some(ErrorBody {
            code: text("error"),
            detail: text("error_description"),
            ..Default::default()
        })
    } else {
        None
    }
}

fn is_string(json: Json<'_>) -> bool {
    json.text().starts_with('"')
}

/// Adobe's API gateway has codes of six digits, and nobody else calls them
/// `error_code`.
fn is_adobes_code(code: &str) -> bool {
    code.len() == 6 && code.bytes().all(|byte| byte.is_ascii_digit())
}

/// The `type` of Adobe's problem documents: `http://ns.adobe.com/aep/errors/…`,
/// `https://…` in newer services; the placeholder is what the troubleshooting
/// guide shows.
fn is_adobes_type(uri: &str) -> bool {
    let uri = uri
        .strip_prefix("https://")
        .or(uri.strip_prefix("http://"))
        .unwrap_or(uri);
    uri.starts_with("ns.adobe.com/") || uri == "/placeholder/type/uri"
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
                ErrorBody {
                    is_adobes: true,
                    code: some("403010"),
                    detail: some("Oauth token is missing."),
                    ..Default::default()
                },
            ),
            (
                r#"{"error_code":403010,"message":null}"#,
                ErrorBody {
                    is_adobes: true,
                    code: some("403010"),
                    ..Default::default()
                },
            ),
            (
                r#"{"type":"/placeholder/type/uri","status":400,"title":"BadRequestError","detail":"A valid content-type must be specified"}"#,
                ErrorBody {
                    is_adobes: true,
                    title: some("BadRequestError"),
                    detail: some("A valid content-type must be specified"),
                    ..Default::default()
                },
            ),
            (
                r#"{"status":400,"title":"T","detail":{"why":"x"},"report":{"id":7}}"#,
                ErrorBody {
                    title: some("T"),
                    detail: some(r#"{"why":"x"}"#),
                    report: some(r#"{"id":7}"#),
                    ..Default::default()
                },
            ),
            (
                r#"{"error":"invalid_client","error_description":"no such client"}"#,
                ErrorBody {
                    code: some("invalid_client"),
                    detail: some("no such client"),
                    ..Default::default()
                },
            ),
        ];
        for (body, expected) in table {
            assert_eq!(
                read(body.as_bytes(), &Redactor::default()),
                expected,
                "{body}"
            );
        }
    }

    #[test]
    fn a_code_is_seen_however_badly_the_text_is_written() {
        for body in [
            b"\xef\xbb\xbf{\"error_code\":\"403010\"}".as_slice(),
            b"{\"error_code\":\"403010\",\"message\":\"jet\xe9n\"}",
            br#"{"error_code":"403010","message":"\ud83d"}"#,
            br#"{"error_code":"403010","at":1e999,"at":-0}"#,
            br#"{"error_code":403010}"#,
        ] {
            let error = read(body, &Redactor::default());
            assert_eq!(error.code.as_deref(), Some("403010"), "{error:?}");
            assert!(error.is_adobes);
        }
    }

    #[test]
    fn a_problem_document_is_adobes_by_its_type() {
        for (uri, expected) in [
            ("http://ns.adobe.com/aep/errors/CTLG-1001-409", true),
            ("https://ns.adobe.com/aep/errors/EXEG-0104-422", true),
            ("/placeholder/type/uri", true),
            ("about:blank", false),
            ("https://cdn.example/ns.adobe.com/", false),
            ("https://ns.adobe.com.example/", false),
        ] {
            let body = format!(r#"{{"type":"{uri}","title":"Conflict","status":409}}"#);
            let error = read(body.as_bytes(), &Redactor::default());
            assert_eq!(error.is_adobes, expected, "{uri}");
            assert_eq!(error.title.as_deref(), Some("Conflict"));
        }
        let nobodys = read(
            br#"{"error_code":"E1","message":"no"}"#,
            &Redactor::default(),
        );
        assert!(!nobodys.is_adobes);
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
            let error = read(body.as_bytes(), &Redactor::default());
            assert!(!error.is_adobes, "{body}");
            assert_eq!(error.detail.as_deref(), Some(body));
        }
        assert_eq!(read(b" \n", &Redactor::default()), ErrorBody::default());
        let long = "x".repeat(1 << 20);
        let detail = read(long.as_bytes(), &Redactor::default()).detail;
        assert_eq!(detail.map(|text| text.len()), Some(LONGEST));
    }
}
