//! Orders for one backend while the agent runs: what is asked for, and which backend is meant.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

/// A backend by group and name, written GROUP/BACKEND.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct BackendPath {
    pub group: String,
    pub backend: String,
}

impl FromStr for BackendPath {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('/') {
            Some((group, backend)) if !group.is_empty() && !backend.is_empty() && !backend.contains('/') => {
                Ok(Self {
                    group: group.to_owned(),
                    backend: backend.to_owned(),
                })
            }
            _ => Err("write the names of the group and of the backend: GROUP/BACKEND".to_owned()),
        }
    }
}

impl fmt::Display for BackendPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.group, self.backend)
    }
}

/// An order for one backend; it holds until another one, across restarts and changes of the configuration, as long as
/// the backend is configured.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct BackendOrder {
    #[serde(flatten)]
    pub path: BackendPath,
    #[serde(flatten)]
    pub order: Order,
}

/// What a backend is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "order", rename_all = "lowercase")]
pub enum Order {
    /// Take no new flows. Those it has may finish; after the timeout, if there is one, the rest is ended.
    Drain { timeout_secs: Option<u32> },
    /// Take new flows again.
    Undrain,
    /// Have this weight (0: no new flows) instead of the configured one; `None`: have that again.
    Weight { weight: Option<u16> },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backend_is_written_with_its_group() {
        let path: BackendPath = "web/ecs01".parse().unwrap();
        assert_eq!(path.to_string(), "web/ecs01");
        for wrong in ["web", "/ecs01", "web/", "a/b/c", ""] {
            assert!(wrong.parse::<BackendPath>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn an_order_is_one_flat_object() {
        let order = BackendOrder {
            path: "web/ecs01".parse().unwrap(),
            order: Order::Drain {
                timeout_secs: Some(300),
            },
        };
        let json = serde_json::json!({
            "group": "web", "backend": "ecs01", "order": "drain", "timeout_secs": 300
        });
        assert_eq!(serde_json::to_value(&order).unwrap(), json);
        assert_eq!(serde_json::from_value::<BackendOrder>(json).unwrap(), order);
    }
}
