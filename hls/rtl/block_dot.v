// Exact dot product of one block: 32 weights times 32 int8 activations, every cycle.
//
// Weights are int8, or int4 stored as the formats store them: 0..15 where the block has a minimum (OFFSET 0), or the
// number plus 8 (OFFSET 8). Turning the top bit makes the latter two's complement, so its bit plane counts negative.
//
// USE_DSP 0: no multipliers. sum(w * x) = sum over the bits p of w of 2**p * sum(x where bit p is set): one adder tree
//   over int8 per bit. A 4-bit weight costs four of them, about 39 LUTs per weight, less than a 4x8 product and a tree.
// USE_DSP 1: one DSP block per product. Two products cannot share one (Xilinx WP486 packs two int8 products that have a
//   factor in common): the weights of a row each meet a different activation.
//
// Latency: `LATENCY` of block_lane.v: 4, or 5 with eight bit planes.
module block_dot #(
    parameter WEIGHT_BITS = 4,
    parameter OFFSET      = 8,
    parameter USE_DSP     = 0,
    parameter SUM_WIDTH   = WEIGHT_BITS == 4 ? 17 : 20  // |15 * 128 * 32| < 2**16; |128 * 127 * 32| < 2**19
) (
    input  wire                         clk,
    input  wire [32 * WEIGHT_BITS-1:0]  weights,      // weight j in bits WEIGHT_BITS * j and up
    input  wire [255:0]                 activations,  // activation j in bits 8 * j and up, -127..127
    output wire signed [SUM_WIDTH-1:0]  sum
);
    genvar j, p;
    generate
        if (USE_DSP) begin : dsp
            // One bit more than the weight has holds 0..15 and -8..7 alike.
            localparam W = WEIGHT_BITS + 1;
            wire [32 * (W + 8) - 1:0] products;
            for (j = 0; j < 32; j = j + 1) begin : multiply
                wire [WEIGHT_BITS-1:0] stored = weights[WEIGHT_BITS * j +: WEIGHT_BITS];
                wire signed [W-1:0] w = WEIGHT_BITS == 8 ? {stored[WEIGHT_BITS-1], stored}
                                      : OFFSET == 8 ? {{2{~stored[WEIGHT_BITS-1]}}, stored[WEIGHT_BITS-2:0]}
                                      : {1'b0, stored};
                wire signed [7:0] x = activations[8 * j +: 8];
                reg signed [W + 7:0] product;
                always @(posedge clk) product <= w * x;
                assign products[(W + 8) * j +: W + 8] = product;
            end
            wire signed [W + 12:0] total;
            adder_tree #(.LEVELS(5), .WIDTH(W + 8)) tree (.clk(clk), .terms(products), .sum(total));
            assign sum = total[SUM_WIDTH-1:0];
        end else begin : planes
            wire signed [12:0] plane [0:WEIGHT_BITS-1];
            for (p = 0; p < WEIGHT_BITS; p = p + 1) begin : bit_plane
                wire [255:0] chosen;
                for (j = 0; j < 32; j = j + 1) begin : choose
                    wire set = weights[WEIGHT_BITS * j + p] ^ (WEIGHT_BITS == 4 && OFFSET == 8 && p == 3);
                    assign chosen[8 * j +: 8] = activations[8 * j +: 8] & {8{set}};
                end
                adder_tree #(.LEVELS(5), .WIDTH(8)) tree (.clk(clk), .terms(chosen), .sum(plane[p]));
            end
            if (WEIGHT_BITS == 4) begin : combine
                reg signed [SUM_WIDTH-1:0] total;
                wire signed [SUM_WIDTH-1:0] top = plane[3] <<< 3;
                always @(posedge clk)
                    total <= plane[0] + (plane[1] <<< 1) + (plane[2] <<< 2) + (OFFSET == 8 ? -top : top);
                assign sum = total;
            end else begin : combine
                reg signed [SUM_WIDTH-1:0] low, high, total;
                always @(posedge clk) begin
                    low   <= plane[0] + (plane[1] <<< 1) + (plane[2] <<< 2) + (plane[3] <<< 3);
                    high  <= plane[4] + (plane[5] <<< 1) + (plane[6] <<< 2) - (plane[7] <<< 3);
                    total <= low + (high <<< 4);
                end
                assign sum = total;
            end
        end
    endgenerate
endmodule
