//! Crate raft 0.7.0 for Python, and nothing of our own about consensus: a node without threads, clock, disk or
//! network, driven by calls.  `space_raft_engine.pyi` is the contract.

mod node;
mod storage;
mod values;
mod wire;

use pyo3::prelude::*;

pyo3::create_exception!(space_raft_engine, RaftError, pyo3::exceptions::PyException);
pyo3::create_exception!(space_raft_engine, Dropped, RaftError);
pyo3::create_exception!(space_raft_engine, Panic, RaftError);

#[pymodule]
mod space_raft_engine {
    use pyo3::prelude::*;
    use pyo3::types::PyBytes;

    #[pymodule_export]
    use crate::node::Node;
    #[pymodule_export]
    use crate::values::{Description, Message, Ready, Status};
    #[pymodule_export]
    use crate::{Dropped, Panic, RaftError};

    #[pymodule_export]
    const ENGINE_VERSION: &str = concat!("raft-rs 0.7.0, binding ", env!("CARGO_PKG_VERSION"));

    #[pymodule_init]
    fn init() {
        crate::node::keep_panics_quiet();
    }

    #[pyfunction]
    fn describe(py: Python<'_>, message: &[u8]) -> PyResult<Description> {
        Description::new(py, &crate::wire::decode_message(message)?)
    }

    #[pyfunction]
    #[pyo3(signature = (changes, *, transition="auto", context=Vec::new()))]
    fn encode_change<'py>(
        py: Python<'py>,
        changes: Vec<(String, u64)>,
        transition: &str,
        context: Vec<u8>,
    ) -> PyResult<Bound<'py, PyBytes>> {
        Ok(PyBytes::new(py, &crate::wire::encode_change(&changes, transition, context)?))
    }

    type Change<'py> = (Vec<(&'static str, u64)>, &'static str, Bound<'py, PyBytes>);

    #[pyfunction]
    fn decode_change<'py>(py: Python<'py>, data: &[u8]) -> PyResult<Change<'py>> {
        let change = crate::wire::decode_change(data)?;
        let (changes, transition) = crate::wire::explain_change(&change);
        Ok((changes, transition, PyBytes::new(py, &change.context)))
    }
}
