//! Questions to the agent's loop, which owns what there is to tell: servers ask, the loop answers.
//!
//! So no handler shares state with the loop, and a loop that is busy is not waited for without end.

use std::time::{Duration, Instant};

use tokio::{
    sync::{mpsc, oneshot},
    time::timeout,
};

use crate::{
    change::{ChangeAnswer, Submission},
    error::{Error, Errors},
    orders::{BackendOrder, BackendPath},
    status::{BackendStatus, Status},
};

/// Requests that wait for the agent's loop; beyond it askers wait to be queued.
const QUEUE: usize = 16;
/// How long the agent's loop may take to answer: it may be building a table.
pub(super) const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// As for [`ANSWER_TIMEOUT`], where many tables may have to be built.
pub(super) const CHANGE_TIMEOUT: Duration = Duration::from_secs(60);

/// Where servers get a status from: the other end is the agent's loop.
#[derive(Clone, Debug)]
pub struct StatusSource(mpsc::Sender<Request>);

/// The agent's end: questions to answer.
#[derive(Debug)]
pub struct Requests(mpsc::Receiver<Request>);

/// One question.
#[derive(Debug)]
pub enum Request {
    Status(Reply<Status>),
    /// One backend.
    Backend(BackendPath, Reply<Result<BackendStatus, Error>>),
    /// An order for a backend, and what it is like then.
    Order(BackendOrder, Reply<Result<BackendStatus, Error>>),
    /// Whether the programs look for packets that somebody wants to see.
    Capture(bool, Reply<Result<(), Error>>),
    /// What this configuration would change; and change it, if `apply`.
    Change {
        submission: Submission,
        apply: bool,
        /// When it reached the agent, to tell how long it took.
        asked_at: Instant,
        reply: Reply<Result<ChangeAnswer, Errors>>,
    },
}

/// Where an answer goes. Whoever asked may have gone, which is as well.
#[derive(Debug)]
pub struct Reply<T>(oneshot::Sender<T>);

impl<T> Reply<T> {
    pub fn send(self, answer: T) {
        let _ = self.0.send(answer);
    }
}

/// The agent's loop has no time, or has ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum NoAnswer {
    #[error("the agent did not answer within {0:?}")]
    TooLate(Duration),
    #[error("the agent is stopping")]
    Stopping,
}

impl StatusSource {
    /// Both ends.
    #[must_use]
    pub fn channel() -> (Self, Requests) {
        let (sender, receiver) = mpsc::channel(QUEUE);
        (Self(sender), Requests(receiver))
    }

    /// The agent's status, if its loop answers within `patience`.
    pub(super) async fn ask(&self, patience: Duration) -> Result<Status, NoAnswer> {
        self.ask_for(patience, Request::Status).await
    }

    /// The answer to any question.
    pub(super) async fn ask_for<T>(
        &self,
        patience: Duration,
        request: impl FnOnce(Reply<T>) -> Request,
    ) -> Result<T, NoAnswer> {
        let asked = async {
            let (sender, receiver) = oneshot::channel();
            self.0
                .send(request(Reply(sender)))
                .await
                .map_err(|_| NoAnswer::Stopping)?;
            receiver.await.map_err(|_| NoAnswer::Stopping)
        };
        timeout(patience, asked)
            .await
            .map_err(|_| NoAnswer::TooLate(patience))?
    }
}

impl StatusSource {
    /// Has the programs look for packets that somebody wants to see, or stop that.
    ///
    /// # Errors
    /// The agent's loop has no time or ends, or the kernel refuses.
    pub async fn capture(&self, on: bool) -> Result<(), Error> {
        let asked = self.ask_for(ANSWER_TIMEOUT, |reply| Request::Capture(on, reply));
        asked.await.map_err(|why| Error::failed(why.to_string()))?
    }
}

impl Requests {
    /// The next question; `None` when every [`StatusSource`] is gone. May be used in `select!`: a question is
    /// never lost.
    pub async fn next(&mut self) -> Option<Request> {
        self.0.recv().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_busy_agent_is_not_waited_for_without_end() {
        let (source, _requests) = StatusSource::channel();
        let answer = source.ask(Duration::from_millis(1)).await;
        assert_eq!(
            answer.unwrap_err().to_string(),
            "the agent did not answer within 1ms"
        );
    }
}
