//! Looking at the data path through the control socket, beside the agent's loop: explained packets, live flows.
//!
//! ```text
//! POST   /v1/explain     `ExplainRequest` to `Explanations`; changes nothing
//! GET    /v1/flows?…     `FlowQuery` to `FlowList`
//! DELETE /v1/flows?…     `FlowQuery` to `Deleted`; asks for a filter, or all=true
//! ```
//!
//! Reads go to the maps themselves, on a thread that may block. Deletions go through the sweep, which owns the table.

use std::{
    collections::{HashMap, hash_map::Entry},
    net::IpAddr,
    sync::Arc,
};

use axum::{
    Json, Router,
    extract::{DefaultBodyLimit, Query, State, rejection},
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use tokio::{sync::watch, task::spawn_blocking};

use crate::{
    api::{EXPLAIN_PATH, FLOWS_PATH, refuse},
    datapath::view::{Arrival, Live},
    error::{EXIT_USAGE, Error},
    explain::{ExplainRequest, Explanation, Explanations},
    flows::{Deleted, FlowList, FlowQuery, FlowTable},
    network::Network,
    state::names::{InterfaceName, Names},
    sweep::SweepHandle,
};

/// Largest request, in bytes: a capture in hexadecimal digits.
const MAX_REQUEST: usize = 64 << 20;

/// What looks at the data path.
pub struct Inspector {
    pub live: Live,
    /// As the agent's loop says.
    pub names: watch::Receiver<Arc<Names>>,
    pub sweep: SweepHandle,
    pub network: Network,
}

/// The routes of the control socket that an inspector answers.
pub fn routes(inspector: Inspector) -> Router {
    Router::new()
        .route(
            EXPLAIN_PATH,
            post(answer_explain).layer(DefaultBodyLimit::max(MAX_REQUEST)),
        )
        .route(FLOWS_PATH, get(answer_flows).delete(answer_delete))
        .with_state(Arc::new(inspector))
}

impl Inspector {
    fn names(&self) -> Arc<Names> {
        self.names.borrow().clone()
    }

    async fn explain(self: Arc<Self>, request: ExplainRequest) -> Result<Explanations, Error> {
        let names = self.names();
        let interfaces = self.arrivals(&names, &request).await?;
        blocking(move || {
            let arrivals: Vec<_> = request
                .packets
                .iter()
                .zip(&interfaces)
                .map(|(packet, interface)| Arrival {
                    frame: &packet.0,
                    ifindex: interface.ifindex,
                    kind: interface.kind,
                })
                .collect();
            let walks = self.live.walk(&arrivals)?;
            let table = self.table(&names);
            let packets = walks.iter().zip(arrivals).zip(&interfaces);
            Ok(Explanations {
                packets: packets
                    .map(|((walk, arrival), interface)| {
                        Explanation::of(walk, arrival.frame, interface, &table)
                    })
                    .collect(),
            })
        })
        .await
    }

    fn table<'a>(&'a self, names: &'a Names) -> FlowTable<'a> {
        FlowTable {
            memory: self.live.flows(),
            times: self.sweep.times(),
            names,
        }
    }

    /// The interface that each packet comes in by.
    async fn arrivals(&self, names: &Names, request: &ExplainRequest) -> Result<Vec<InterfaceName>, Error> {
        let attached = || {
            let names: Vec<_> = names.interfaces.iter().map(|one| one.name.as_str()).collect();
            format!("interfaces with a program: {}", names.join(", "))
        };
        if let Some(name) = &request.interface {
            let found = names.interfaces.iter().find(|one| one.name == *name);
            let found = found.ok_or_else(|| {
                Error::usage(format!("no program is attached to an interface \"{name}\"")).hint(attached())
            })?;
            return Ok(vec![found.clone(); request.packets.len()]);
        }
        let Some(first) = names.interfaces.first() else {
            return Err(Error::failed("no program is attached to any interface"));
        };
        let mut guesses = HashMap::new();
        let mut interfaces = Vec::new();
        for packet in &request.packets {
            let source = source(&packet.0);
            let guess = match guesses.entry(source) {
                Entry::Occupied(known) => known.into_mut(),
                Entry::Vacant(unknown) => unknown.insert(self.towards(names, source).await.unwrap_or(first)),
            };
            interfaces.push(guess.clone());
        }
        Ok(interfaces)
    }

    /// The interface with a program that leads to a host.
    async fn towards<'a>(&self, names: &'a Names, host: Option<IpAddr>) -> Option<&'a InterfaceName> {
        let route = self.network.route_to(host?, None).await.ok()?;
        names.interfaces.iter().find(|one| one.ifindex == route.interface)
    }

    async fn list(self: Arc<Self>, query: FlowQuery) -> Result<FlowList, Error> {
        blocking(move || self.table(&self.names()).list(&query)).await
    }

    async fn delete(self: Arc<Self>, query: FlowQuery) -> Result<Deleted, Error> {
        if query.filters() == query.all {
            return Err(Error::usage("which flows are to be deleted is not said")
                .hint("give a filter such as client=192.0.2.7, or all=true and no filter"));
        }
        let inspector = self.clone();
        let found = blocking(move || inspector.table(&inspector.names()).bindings(&query)).await?;
        Ok(Deleted {
            deleted: self.sweep.delete(found).await?,
        })
    }
}

/// The source of an IP packet in an Ethernet frame without tags.
fn source(frame: &[u8]) -> Option<IpAddr> {
    match frame.get(12..14)? {
        [0x86, 0xdd] => Some(IpAddr::from(<[u8; 16]>::try_from(frame.get(22..38)?).ok()?)),
        [8, 0] => Some(IpAddr::from(<[u8; 4]>::try_from(frame.get(26..30)?).ok()?)),
        _ => None,
    }
}

/// Runs what may take a while where it disturbs nobody.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    match spawn_blocking(work).await {
        Ok(outcome) => outcome,
        Err(_) => Err(Error::failed("the agent is stopping")),
    }
}

async fn answer_explain(
    State(inspector): State<Arc<Inspector>>,
    request: Result<Json<ExplainRequest>, rejection::JsonRejection>,
) -> Response {
    match request {
        Ok(Json(request)) => answer(inspector.explain(request).await),
        Err(error) => refuse(error.status(), error.body_text(), None),
    }
}

async fn answer_flows(
    State(inspector): State<Arc<Inspector>>,
    query: Result<Query<FlowQuery>, rejection::QueryRejection>,
) -> Response {
    match query {
        Ok(Query(query)) => answer(inspector.list(query).await),
        Err(error) => refuse(error.status(), error.body_text(), None),
    }
}

async fn answer_delete(
    State(inspector): State<Arc<Inspector>>,
    query: Result<Query<FlowQuery>, rejection::QueryRejection>,
) -> Response {
    match query {
        Ok(Query(query)) => answer(inspector.delete(query).await),
        Err(error) => refuse(error.status(), error.body_text(), None),
    }
}

fn answer(outcome: Result<impl serde::Serialize, Error>) -> Response {
    match outcome {
        Ok(answer) => Json(answer).into_response(),
        Err(error) => {
            let code = if error.exit_code == EXIT_USAGE {
                StatusCode::BAD_REQUEST
            } else {
                StatusCode::INTERNAL_SERVER_ERROR
            };
            refuse(code, error.what, error.hint.as_deref())
        }
    }
}
