//! Looking at the data path through the control socket, beside the agent's loop: explained packets, live flows.
//!
//! ```text
//! POST   /v1/explain     `ExplainRequest` to `Explanations`; changes nothing
//! GET    /v1/flows?…     `FlowQuery` to `FlowList`
//! DELETE /v1/flows?…     `FlowQuery` to `Deleted`; asks for a filter, or all=true
//! POST   /v1/capture     `CaptureRequest` to a pcapng file, as long as somebody reads
//! POST   /v1/trace       the same to a line of JSON for each packet
//! ```
//!
//! Reads go to the maps themselves, on a thread that may block. Deletions go through the sweep, which owns the table.

use std::{
    collections::{HashMap, hash_map::Entry},
    net::IpAddr,
    sync::Arc,
};

use axum::{
    Extension, Json,
    extract::State,
    http::header::CONTENT_TYPE,
    response::{IntoResponse, Response},
};
use tokio::{sync::watch, task::spawn_blocking};
use utoipa_axum::{router::OpenApiRouter, routes};

use crate::{
    api::{
        Body, CAPTURE_PATH, EXPLAIN_PATH, ErrorBody, ErrorCode, FLOWS_PATH, Parameters, Refusal,
        StatusSource, TRACE_PATH,
    },
    capture::{CaptureRequest, Capturer, Form, TracedPacket},
    datapath::view::{Arrival, Live},
    error::Error,
    explain::{ExplainRequest, Explanation, Explanations},
    flows::{Deleted, FlowList, FlowQuery, FlowTable},
    network::Network,
    state::names::{InterfaceName, Names},
    sweep::SweepHandle,
};

/// What looks at the data path.
pub struct Inspector {
    pub live: Live,
    /// As the agent's loop says.
    pub names: watch::Receiver<Arc<Names>>,
    pub sweep: SweepHandle,
    pub network: Network,
    pub capturer: Capturer,
}

/// The inspector as handlers find it.
#[derive(Clone)]
pub struct Inspection(Option<Arc<Inspector>>);

impl From<Inspector> for Inspection {
    fn from(inspector: Inspector) -> Self {
        Self(Some(Arc::new(inspector)))
    }
}

impl Inspection {
    /// Without a data path to look at.
    #[must_use]
    pub fn none() -> Self {
        Self(None)
    }

    /// What hands it to the handlers of [`calls`].
    pub(crate) fn into_layer(self) -> Extension<Self> {
        Extension(self)
    }

    fn inspector(self) -> Result<Arc<Inspector>, Refusal> {
        self.0
            .ok_or_else(|| Refusal::new(ErrorCode::Unavailable, "there is no data path to look at", None))
    }
}

/// The calls that an inspector answers.
pub(crate) fn calls() -> OpenApiRouter<StatusSource> {
    OpenApiRouter::new()
        .routes(routes!(answer_explain))
        .routes(routes!(answer_flows, answer_delete))
        .routes(routes!(answer_capture))
        .routes(routes!(answer_trace))
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

/// What would happen to packets, step by step, from the live tables; changes nothing
#[utoipa::path(
    post,
    operation_id = "explain",
    path = EXPLAIN_PATH,
    tag = "data path",
    request_body = ExplainRequest,
    responses((status = 200, body = Explanations), (status = "default", body = ErrorBody))
)]
async fn answer_explain(
    Extension(inspection): Extension<Inspection>,
    Body(request): Body<ExplainRequest>,
) -> Result<Json<Explanations>, Refusal> {
    Ok(Json(inspection.inspector()?.explain(request).await?))
}

/// Live flows
#[utoipa::path(
    get,
    operation_id = "flows",
    path = FLOWS_PATH,
    tag = "data path",
    params(FlowQuery),
    responses((status = 200, body = FlowList), (status = "default", body = ErrorBody))
)]
async fn answer_flows(
    Extension(inspection): Extension<Inspection>,
    Parameters(query): Parameters<FlowQuery>,
) -> Result<Json<FlowList>, Refusal> {
    Ok(Json(inspection.inspector()?.list(query).await?))
}

/// Deletes flows: their connections break; asks for a filter, or all=true
#[utoipa::path(
    delete,
    operation_id = "delete_flows",
    path = FLOWS_PATH,
    tag = "data path",
    params(FlowQuery),
    responses((status = 200, body = Deleted), (status = "default", body = ErrorBody))
)]
async fn answer_delete(
    Extension(inspection): Extension<Inspection>,
    Parameters(query): Parameters<FlowQuery>,
) -> Result<Json<Deleted>, Refusal> {
    Ok(Json(inspection.inspector()?.delete(query).await?))
}

/// Packets as the data path sees them, as pcapng, while somebody reads; one capture or trace at a time
#[utoipa::path(
    post,
    operation_id = "capture",
    path = CAPTURE_PATH,
    tag = "data path",
    request_body = CaptureRequest,
    responses(
        (status = 200, description = "pcapng, as it comes", content_type = "application/x-pcapng"),
        (status = "default", body = ErrorBody)
    )
)]
async fn answer_capture(
    State(source): State<StatusSource>,
    Extension(inspection): Extension<Inspection>,
    Body(request): Body<CaptureRequest>,
) -> Result<Response, Refusal> {
    captured(source, inspection, &request, Form::Pcapng).await
}

/// The same in words, a line of JSON for each packet
#[utoipa::path(
    post,
    operation_id = "trace",
    path = TRACE_PATH,
    tag = "data path",
    request_body = CaptureRequest,
    responses(
        (status = 200, description = "a packet on each line", body = TracedPacket, content_type = "application/x-ndjson"),
        (status = "default", body = ErrorBody)
    )
)]
async fn answer_trace(
    State(source): State<StatusSource>,
    Extension(inspection): Extension<Inspection>,
    Body(request): Body<CaptureRequest>,
) -> Result<Response, Refusal> {
    captured(source, inspection, &request, Form::Lines).await
}

async fn captured(
    source: StatusSource,
    inspection: Inspection,
    request: &CaptureRequest,
    form: Form,
) -> Result<Response, Refusal> {
    let inspector = inspection.inspector()?;
    let names = inspector.names();
    let reading = inspector.capturer.begin(request, form, names, source).await?;
    let content_type = match form {
        Form::Pcapng => "application/x-pcapng",
        Form::Lines => "application/x-ndjson",
    };
    let body = axum::body::Body::from_stream(reading.into_stream());
    Ok(([(CONTENT_TYPE, content_type)], body).into_response())
}
