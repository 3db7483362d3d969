//! How calls of the API fail: one JSON form, whoever refuses.
//!
//! ```text
//! {"errors": [{"code": "invalid", "what": "…", "where": {"file": "…", "line": 3}, "hint": "…"}]}
//! ```
//!
//! The code decides the HTTP status, and what a command that meets the error exits with. Bodies and queries are read
//! here too, so that what is wrong with them comes in the same form.

use std::path::PathBuf;

use axum::{
    Json,
    extract::{FromRequest, FromRequestParts, Query, Request, rejection::JsonRejection},
    http::{StatusCode, request::Parts},
    response::{IntoResponse, Response},
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use utoipa::ToSchema;

use crate::error::{EXIT_FAILED, EXIT_HOST, EXIT_USAGE, Error, Errors, Location};

/// Why a call failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorBody {
    /// All that is wrong, in the order of a file if one is meant; at least one.
    #[schema(min_items = 1)]
    pub errors: Vec<ErrorText>,
}

/// One thing that is wrong, and what to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorText {
    pub code: ErrorCode,
    /// What is wrong, naming the object.
    pub what: String,
    /// Where it is wrong, if that is a place in a file.
    #[serde(default, rename = "where", skip_serializing_if = "Option::is_none")]
    pub place: Option<Place>,
    /// What to do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

/// A place in a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Place {
    /// As the request called it.
    #[schema(value_type = String)]
    pub file: PathBuf,
    /// From 1; absent when the whole file is meant.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub line: Option<usize>,
}

/// What kind of error it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ErrorCode {
    /// 400 (413, 415): the request is not what the call reads.
    Malformed,
    /// 401: no token, or a wrong one.
    Unauthorized,
    /// 404: there is no such call.
    NotFound,
    /// 405: there is such a path, but not with this method.
    MethodNotAllowed,
    /// 422: what is asked for is wrong: a configuration, a name.
    Invalid,
    /// 500: it was tried and failed.
    Failed,
    /// 500: this host cannot do it.
    Host,
    /// 503: the agent has no time, or is stopping.
    Unavailable,
}

impl ErrorCode {
    fn status(self) -> StatusCode {
        match self {
            Self::Malformed => StatusCode::BAD_REQUEST,
            Self::Unauthorized => StatusCode::UNAUTHORIZED,
            Self::NotFound => StatusCode::NOT_FOUND,
            Self::MethodNotAllowed => StatusCode::METHOD_NOT_ALLOWED,
            Self::Invalid => StatusCode::UNPROCESSABLE_ENTITY,
            Self::Failed | Self::Host => StatusCode::INTERNAL_SERVER_ERROR,
            Self::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        }
    }

    /// What a command that meets it exits with.
    fn exit_code(self) -> u8 {
        match self {
            Self::Malformed | Self::Invalid => EXIT_USAGE,
            Self::Host => EXIT_HOST,
            Self::Unauthorized
            | Self::NotFound
            | Self::MethodNotAllowed
            | Self::Failed
            | Self::Unavailable => EXIT_FAILED,
        }
    }
}

impl From<Error> for ErrorText {
    fn from(error: Error) -> Self {
        Self {
            code: match error.exit_code {
                EXIT_USAGE => ErrorCode::Invalid,
                EXIT_HOST => ErrorCode::Host,
                _ => ErrorCode::Failed,
            },
            what: error.what,
            place: error.location.map(|location| Place {
                file: location.file,
                line: Some(location.line).filter(|line| *line > 0),
            }),
            hint: error.hint,
        }
    }
}

impl From<ErrorText> for Error {
    fn from(text: ErrorText) -> Self {
        Self {
            what: text.what,
            location: text.place.map(|place| Location {
                file: place.file,
                line: place.line.unwrap_or(0),
            }),
            hint: text.hint,
            exit_code: text.code.exit_code(),
        }
    }
}

/// A call that failed.
#[derive(Debug)]
pub struct Refusal {
    status: StatusCode,
    body: ErrorBody,
}

impl Refusal {
    /// One error.
    pub fn new(code: ErrorCode, what: impl Into<String>, hint: Option<&str>) -> Self {
        Self {
            status: code.status(),
            body: ErrorBody {
                errors: vec![ErrorText {
                    code,
                    what: what.into(),
                    place: None,
                    hint: hint.map(str::to_owned),
                }],
            },
        }
    }
}

impl From<Errors> for Refusal {
    fn from(errors: Errors) -> Self {
        let errors: Vec<ErrorText> = errors.0.into_iter().map(ErrorText::from).collect();
        Self {
            status: errors
                .first()
                .map_or(StatusCode::INTERNAL_SERVER_ERROR, |first| first.code.status()),
            body: ErrorBody { errors },
        }
    }
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Errors::from(error).into()
    }
}

impl From<Refusal> for ErrorBody {
    fn from(refusal: Refusal) -> Self {
        refusal.body
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        (self.status, Json(self.body)).into_response()
    }
}

/// The body of a request, as JSON.
#[derive(Debug)]
pub struct Body<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Body<T> {
    type Rejection = Refusal;

    async fn from_request(request: Request, state: &S) -> Result<Self, Refusal> {
        match Json::from_request(request, state).await {
            Ok(Json(body)) => Ok(Self(body)),
            Err(rejection) => {
                let hint = match rejection {
                    JsonRejection::MissingJsonContentType(_) => {
                        Some("send it with `Content-Type: application/json`")
                    }
                    _ => None,
                };
                // 413 and 415 tell programs more than 400 does; where the JSON is of another shape, axum's own 422
                // would mean what it does not mean here.
                let status = match rejection.status() {
                    StatusCode::UNPROCESSABLE_ENTITY => StatusCode::BAD_REQUEST,
                    status => status,
                };
                Err(Refusal {
                    status,
                    ..Refusal::new(ErrorCode::Malformed, rejection.body_text(), hint)
                })
            }
        }
    }
}

/// The query of a request.
#[derive(Debug)]
pub struct Parameters<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for Parameters<T> {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Refusal> {
        match Query::from_request_parts(parts, state).await {
            Ok(Query(parameters)) => Ok(Self(parameters)),
            Err(rejection) => Err(Refusal::new(ErrorCode::Malformed, rejection.body_text(), None)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_arrives_as_it_left() {
        let place = Location {
            file: "a.toml".into(),
            line: 3,
        };
        for error in [
            Error::usage("wrong").at(place).hint("right"),
            Error::host("no"),
            Error::failed("broke"),
        ] {
            let json = serde_json::to_string(&ErrorText::from(error.clone())).unwrap();
            let text: ErrorText = serde_json::from_str(&json).unwrap();
            assert_eq!(Error::from(text), error, "{json}");
        }
    }

    #[test]
    fn the_form_is_one() {
        let error = Error::usage("wrong")
            .at(Location {
                file: "a.toml".into(),
                line: 3,
            })
            .hint("right");
        let refusal = Refusal::from(error);
        assert_eq!(refusal.status, StatusCode::UNPROCESSABLE_ENTITY);
        assert_eq!(
            serde_json::to_value(&refusal.body).unwrap(),
            serde_json::json!({"errors": [
                {"code": "invalid", "what": "wrong", "where": {"file": "a.toml", "line": 3}, "hint": "right"}
            ]})
        );
    }
}
