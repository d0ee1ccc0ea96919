// Words for dataflow that mean the same to Vitis HLS and to C simulation.
//
//   FIFO(type, name, depth);           one stream;  FIFOS(type, name, count, depth); several
//   DATAFLOW                           behind the FIFOs and before the first process (beside `#pragma HLS dataflow`)
//   PROCESS(function(arguments));      a process of the region: to Vitis the plain call
#pragma once
#include "hls_stream.h"

#define HLS_PRAGMA(...) _Pragma(#__VA_ARGS__)

#ifdef __VITIS_HLS__
#define FIFO(TYPE, NAME, DEPTH) hls::stream<TYPE, DEPTH> NAME(#NAME)
#define FIFOS(TYPE, NAME, COUNT, DEPTH) hls::stream<TYPE, DEPTH> NAME[COUNT]
#define DATAFLOW
#define PROCESS(...) __VA_ARGS__
#else
#define FIFO(TYPE, NAME, DEPTH) hls::stream<TYPE, DEPTH> NAME(#NAME)
#define FIFOS(TYPE, NAME, COUNT, DEPTH)  \
    hls::stream<TYPE, DEPTH> NAME[COUNT]; \
    csim::name_all(NAME, #NAME)
#define DATAFLOW csim::Region region;
#define PROCESS(...) region.start(#__VA_ARGS__, [&] { __VA_ARGS__; })
#endif
