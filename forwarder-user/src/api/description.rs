//! The API described for programs: OpenAPI 3.1, made from the handlers and the types that they read and answer.
//!
//! docs/openapi.json is this text, and `GET /v1/openapi.json` serves it. Router and description are built together
//! (`utoipa_axum`), so a call without a description cannot be added by accident.

use std::sync::LazyLock;

use axum::{
    http::header::CONTENT_TYPE,
    response::{IntoResponse, Response},
};
use utoipa::OpenApi as _;
use utoipa_axum::router::OpenApiRouter;

use super::{ErrorBody, OPENAPI_PATH};

#[derive(utoipa::OpenApi)]
#[openapi(
    info(
        title = "forwarder",
        description = "The control API of the forwarder's agent, on its Unix socket. Names of fields are stable; \
                       new ones may come."
    ),
    servers((url = "http://localhost", description = "the host name in requests over the Unix socket is not looked at")),
    components(schemas(ErrorBody))
)]
struct Document;

/// A router to add calls to, whose description has everything but those.
pub(super) fn router<S: Clone + Send + Sync + 'static>() -> OpenApiRouter<S> {
    OpenApiRouter::with_openapi(Document::openapi())
}

static TEXT: LazyLock<String> = LazyLock::new(|| {
    let document = super::calls().into_openapi();
    let mut text = document
        .to_pretty_json()
        .unwrap_or_else(|error| unreachable!("a description is JSON: {error}"));
    text.push('\n');
    text
});

/// All calls by path, for those who miss one.
pub(super) static PATHS: LazyLock<String> = LazyLock::new(|| {
    let document = super::calls().into_openapi();
    let paths: Vec<&str> = document.paths.paths.keys().map(String::as_str).collect();
    paths.join(", ")
});

/// This description
#[utoipa::path(
    get,
    operation_id = "openapi",
    path = OPENAPI_PATH,
    tag = "agent",
    responses((status = 200, description = "OpenAPI 3.1", content_type = "application/json"))
)]
pub(super) async fn answer_description() -> Response {
    ([(CONTENT_TYPE, "application/json")], TEXT.as_str()).into_response()
}
